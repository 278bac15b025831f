"""What a job needs, as numbered parts that are carried to a machine without a network, and put in place there.

The side that puts in place (``unbundle.py`` and what that imports) takes torch and numpy alone: other packages
may come in the bundle.
"""
