"""Tracing: the `with` front end, which records a plan. Inside of the block nothing is computed; its end runs the model.

`trace.py` is the block, `proxy.py` what stands for values in it, `cells.py` where a proxy's value comes from and what
writing to it does, `places.py` which hook points are a module's ends, `lowering.py` how what was written down becomes
a plan.
"""
