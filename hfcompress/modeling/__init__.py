"""What a compressed model is: where its parts live, how they shrink, how it is saved and rebuilt."""
