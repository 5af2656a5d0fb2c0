"""What runs train on: pictures, masks, planted items, sets, models to start from, and kinds of run."""
