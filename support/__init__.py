"""What a run needs and the method does not: options, hardware, files, tables, processes."""
