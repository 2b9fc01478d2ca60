"""`fastssl doctor`: `facts` gathers what a machine is like, and the pure functions of `checks` judge it."""
