"""Groups of rules as files that something loads: a module a program."""
