"""The LLM.int8() product in plain XLA: one way for one row, one for few rows, one for many.

All multiply the same int8 values, and digits of the outliers (see `jint8._ops.digits`), whose sums are exact. What
differs is how the digits meet the weights:

- one row, on a CPU: where it has no outliers, as most rows, sums of products of 16-bit integers in code that XLA writes
  itself. An int8 product there is a call of a library that packs the weights first; with outliers it is worth that.
- few rows: three int8 digits, stacked under the regular rows, in ONE product that reads the weights once. On a CPU that
  product is bound by reading the weights, and more rows are nearly free.
- many rows: only the outlier columns, gathered in blocks, with a trip count that depends on the data. Their digits are
  wider and float32, and there are two: with so few columns to sum over, a product's time goes into writing its rows.
"""
