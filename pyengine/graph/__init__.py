"""What is computed: symbolic tensors, ops as declarations, graphs."""
