"""This machine, and how fast it is: names, clocks, roofline."""
