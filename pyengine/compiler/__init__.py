"""Graph to graph: fusions, the plan of memory, cuts over devices, and the C code that ops declare."""
