"""`fastssl bench gpu`: all that a GPU is measured for, most telling things first, in one command of a given length."""
