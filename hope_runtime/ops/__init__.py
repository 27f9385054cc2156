"""Update rules as pure functions: the equation as it reads, and one efficient form of each."""
