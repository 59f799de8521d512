"""`potluck doctor`: what works on this host and in its pool, and for each problem what to do.

Gatherers have deadlines and return facts; what the facts mean is decided by functions of values alone.
"""
