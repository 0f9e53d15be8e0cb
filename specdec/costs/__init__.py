"""What decoding costs: measured on this machine, or assumed for another one."""
