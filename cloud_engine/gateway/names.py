"""Names of models that every cloud engine answers to, whatever it runs."""

VIRTUAL_MODELS = ("auto", "cloud")
