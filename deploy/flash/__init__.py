"""`covey flash`: a stock image onto a card, with what lets it join the fleet by itself."""
