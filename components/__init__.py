"""The science: data, model, diffusion, metrics. Plain torch; knows neither Ray nor MLflow.

Imports inside this package are relative, because a registered model carries a copy of it under another name.
"""
