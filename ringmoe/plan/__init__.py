"""Plans: which exchange an op uses, over which axes, and why. Frozen data without arrays, made by cached pure functions.

A plan is made from the op's sharding rule and the mesh axes of each of its factors (rules.py), whichever door found them.
"""
