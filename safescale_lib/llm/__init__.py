"""Survey chapter 3: attacks on large language models and their defenses, a module or package for each section."""
