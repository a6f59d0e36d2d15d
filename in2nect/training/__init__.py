"""Training: the LightningModule, the data module, callbacks and the command line. Import from the modules: only `cli`
is light.
"""
