"""kohya sd-scripts: its checkout, the places that kwrap corrects, and its worker."""
