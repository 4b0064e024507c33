"""The modules that compression puts into models: each owns its shape, its rebuild and its sentinel.

A sentinel is a float buffer named `weight` of shape `[1]`. A stock model that is offered such a checkpoint
without hfcompress finds a `weight` of the wrong shape and refuses it, where it would otherwise leave the layer
at random values with no more than a log line.
"""
