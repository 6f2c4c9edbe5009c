"""The part of an adapter's model card (README.md) that only this package can write."""


def update_model_card(folder, config):
    pass
