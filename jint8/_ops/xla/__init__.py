"""The LLM.int8() product in plain XLA: ways for one row, for few rows and for many.

Start with `paths`, which chooses one of them; `decomposed` and `plain` are what they are made of. All multiply the same
int8 values, and digits of the outliers (see `jint8._ops.digits`), whose sums are exact. What differs is how the digits
meet the weights:

- One row, on a CPU (`one_row`): where it has no outliers, as most rows, sums of products of 16-bit integers in code
  that XLA writes itself. An int8 product there is a call of a library that packs the weights first; with outliers it is
  worth that.
- Few rows (`decomposed`): three int8 digits, stacked under the regular rows, in ONE product that reads the weights
  once. On a CPU that product is bound by reading the weights, and more rows are nearly free.
- Many rows (`many_rows`): only the outlier columns, gathered in blocks, with a trip count that depends on the data.
- Many rows on a TPU (`selected`): the outlier columns by a product with a matrix of zeros and ones, without a loop.
"""
