"""How figures look, in the library, its benchmarks and its examples. Needs matplotlib."""
