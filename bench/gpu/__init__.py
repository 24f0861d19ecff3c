"""Kernels for graphics cards in numbers: what compilers and the emulator say of them (`figures`), and what a card does (`check`)."""
