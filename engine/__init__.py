"""How a model runs fast and in little memory: sampling, packing, cache, vocabulary, memory, processes.

Nothing here changes a number.
"""
