"""`fastssl demo` and the synthetic aerial tiles that it draws."""
