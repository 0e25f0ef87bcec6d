"""CLIP's data recipe: queries, the pairs that they find, at most so many for each; an Apache Beam pipeline.

queries (the list) · matching (which of them a text holds) · records (what is known of a pair, and what refuses it) ·
duplicates · balance · shards (what is written) · pipeline (the stages, in their order) · report. The README beside
this file says how it is run, and what it costs at 400 million and 5 billion pairs.
"""
