"""The library behind Safety at Scale: the hands-on companion.

The survey is the map: a chapter is a package, a section is a module, a technique is a function. Importing this
package imports nothing heavy; `safescale_lib.zoo`, `.search`, `.measure` and the chapters load what they need.
"""

__version__ = "0.1.0"
