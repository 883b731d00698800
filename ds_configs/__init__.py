"""The DeepSpeed files as package data: ``importlib.resources.files("bpo_ds_configs") / "zero3.json"``.

This file exists because importlib.resources cannot list a namespace package in an editable install.
"""
