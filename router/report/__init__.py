"""`router report`: one HTML page of what the router is worth, by tables of outcomes, and of what it did.

Values in, text out: whoever calls has read the tables and the journal, and writes the page.
"""
