"""What every command needs of the machine: errors, files, flags, processes, signals."""
