"""Products and parts of a decoder's layer on CPUs in C++, called by XLA.

`native` loads the library and calls it, `compile` makes it. In `src`, `handler.cc` and `decode_handlers.cc` are what
XLA calls, `product.cc` is one product, and `kernels.cc` what is compiled once for each instruction set: how it
multiplies is in `isa.h`, what it computes in `rounding.h`, `dots.h` (few rows), `tiles.h` (many), `finish.h`,
`attention.h` and `gated.h`.
The library is compiled when the package is installed, where there is a C++ compiler; without it XLA computes all.
"""
