"""One memory budget for all processes of a device: leases over a Unix socket."""
