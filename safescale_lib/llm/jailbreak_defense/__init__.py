"""Survey section 3.4: defenses against jailbreaks, a module for each place in which they stand."""
