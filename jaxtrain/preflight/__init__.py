"""Whether a run would work here, found out in half a minute: software, clocks, folders, devices, links, memory, data."""
