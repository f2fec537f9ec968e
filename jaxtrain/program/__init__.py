"""Readers of compiled programs: their text, groups of devices, collectives, and what their instructions take."""
