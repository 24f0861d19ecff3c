"""Caches that forget: policies that keep some cells of a layer's cache, and merge the others into them. docs/cache-compression.md.

`base` has what all share, `attention` the policies that keep what was attended to, `layers` those with budgets for each layer, `diverse`
the one that mixes importance with diversity, `merging` what becomes of evicted cells, `written` policies as texts.
"""
