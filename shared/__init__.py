"""The contract of the wire: what both ends of a Causeway connection must agree on.

Leaf package: imports no other package of ours. A module lives here only if BOTH ends depend on it.
"""
