"""What commands print about models and machines: plans, speed, files, graphs, hardware."""
