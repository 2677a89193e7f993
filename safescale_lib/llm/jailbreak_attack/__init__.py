"""Survey section 3.3: ways to make an aligned model answer what it refuses, a module for each family of them."""
