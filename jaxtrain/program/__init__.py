"""Read compiled programs: their text, groups of devices, collectives, and the cost of their instructions."""
