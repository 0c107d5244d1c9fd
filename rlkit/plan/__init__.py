"""What a recipe would take of a machine that need not be there: predicted from sizes, counts and a table of devices."""
