"""The trainers' code: the checkout of sd-scripts, the places in it that kwrap relies on, and what each engine takes."""
