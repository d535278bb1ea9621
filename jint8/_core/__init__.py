"""What an int8 weight is, and the arithmetic between floats and int8."""
