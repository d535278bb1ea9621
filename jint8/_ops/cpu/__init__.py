"""The product on CPUs in C++, called by XLA: `native` loads the library and calls it, `compile` makes it.

`src/handler.cc` is what XLA calls, `src/product.cc` one product, `src/kernels.cc` what depends on the instruction set.
The library is compiled when the package is installed, where there is a C++ compiler; without it XLA multiplies.
"""
