"""Check in half a minute whether a run would work here: software, clocks, folders, devices, links, memory, data."""
