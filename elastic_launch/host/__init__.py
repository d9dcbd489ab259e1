"""What the host offers: devices, CPUs, memory limits, ports, the console, signals and child processes."""
