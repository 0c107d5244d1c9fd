"""A run or a curriculum told afterwards, from its folder alone: numbers, a sentence, a page."""
