"""Files of other libraries, and for them."""
