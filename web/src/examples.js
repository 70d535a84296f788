// Example programs. The editor starts with the first one of a language.

const input = "3 4 5\n12 30\n";

export const EXAMPLES = {
  pivot: [
    { title: "Hello", code: `use std::io;

fn main() i64 {
    println!("hello");
    return 0;
}
` },
    { title: "Loops", code: `use std::io;

fn main() i64 {
    let sum = 0;
    for let i = 1; i <= 10; i = i + 1 {
        sum = sum + i;
        println!(sum);
    }
    return 0;
}
` },
    { title: "Structs and methods", code: `use std::io;

struct Counter {
    value: i64;
}

impl Counter {
    fn add(step: i64) void {
        self.value = self.value + step;
        return;
    }
}

fn main() i64 {
    let counter = Counter{
        value: 0
    };
    counter.add(40);
    counter.add(2);
    println!(counter.value);
    return 0;
}
` },
  ],
  c: [
    { title: "Hello", code: `#include <stdio.h>

int main(void) {
    puts("hello");
    return 0;
}
` },
    { title: "Sum of the input", stdin: input, code: `#include <stdio.h>

int main(void) {
    long number, sum = 0;
    while (scanf("%ld", &number) == 1)
        sum += number;
    printf("sum: %ld\\n", sum);
    return 0;
}
` },
    { title: "Mandelbrot", code: `#include <stdio.h>

int main(void) {
    for (int row = -12; row <= 12; row++) {
        for (int column = -44; column <= 20; column++) {
            double a = 0, b = 0;
            int steps = 0;
            while (a * a + b * b < 4 && steps < 95) {
                double next = a * a - b * b + column / 22.0;
                b = 2 * a * b + row / 10.0;
                a = next;
                steps++;
            }
            if (steps == 95)
                putchar(' ');
            else
                printf("\\033[38;5;%dm#\\033[0m", 33 + steps % 6 * 6);
        }
        putchar('\\n');
    }
    return 0;
}
` },
  ],
  cpp: [
    { title: "Hello", code: `#include <iostream>

int main() {
    std::cout << "hello\\n";
}
` },
    { title: "Words of the input, counted", stdin: "the quick fox and the slow fox\n", code: `#include <iostream>
#include <map>
#include <string>

int main() {
    std::map<std::string, int> count;
    for (std::string word; std::cin >> word;)
        ++count[word];
    for (const auto& [word, times] : count)
        std::cout << times << ' ' << word << '\\n';
}
` },
  ],
  python: [
    { title: "Hello", code: `print("hello")
` },
    { title: "Sum of the input", stdin: input, code: `import sys

numbers = [int(word) for word in sys.stdin.read().split()]
print(f"{len(numbers)} numbers, sum {sum(numbers)}")
` },
    { title: "Colours", code: `for row in range(6):
    for colour in range(16 + 36 * row, 52 + 36 * row):
        print(f"\\033[38;5;{colour}m■", end="")
    print("\\033[0m")

for code, name in enumerate("red green yellow blue magenta cyan".split(), start=31):
    print(f"\\033[{code}m{name}\\033[0m \\033[1;{code}mbold\\033[0m \\033[3;{code}mitalic\\033[0m")
` },
  ],
  javascript: [
    { title: "Hello", code: `console.log("hello");
` },
    { title: "Sum of the input", stdin: input, code: `const text = require("node:fs").readFileSync(0, "utf8");
const numbers = text.split(/\\s+/).filter(Boolean).map(Number);
console.log("sum:", numbers.reduce((a, b) => a + b, 0));
` },
    { title: "Primes", code: `function* primes() {
    const found = [];
    for (let n = 2; ; n++) {
        if (found.every((p) => n % p)) {
            found.push(n);
            yield n;
        }
    }
}

for (const prime of primes()) {
    if (prime > 50) break;
    console.log(prime);
}
` },
  ],
  go: [
    { title: "Hello", code: `package main

import "fmt"

func main() {
	fmt.Println("hello")
}
` },
    { title: "Goroutines", code: `package main

import "fmt"

func square(numbers <-chan int, squares chan<- int) {
	for n := range numbers {
		squares <- n * n
	}
	close(squares)
}

func main() {
	numbers, squares := make(chan int), make(chan int)
	go square(numbers, squares)
	go func() {
		for n := 1; n <= 10; n++ {
			numbers <- n
		}
		close(numbers)
	}()
	for s := range squares {
		fmt.Println(s)
	}
}
` },
  ],
  rust: [
    { title: "Hello", code: `fn main() {
    println!("hello");
}
` },
    { title: "Sum of the input", stdin: input, code: `use std::io::Read;

fn main() -> std::io::Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let sum: i64 = text.split_whitespace().filter_map(|word| word.parse::<i64>().ok()).sum();
    println!("sum: {sum}");
    Ok(())
}
` },
    { title: "Threads", code: `use std::sync::mpsc;
use std::thread;

fn main() {
    let (sender, receiver) = mpsc::channel();
    for worker in 0..4 {
        let sender = sender.clone();
        thread::spawn(move || sender.send((worker, (1..=worker + 5).product::<u64>())));
    }
    drop(sender);
    let mut results: Vec<_> = receiver.iter().collect();
    results.sort();
    for (worker, product) in results {
        println!("worker {worker}: {product}");
    }
}
` },
  ],
  bash: [
    { title: "Hello", code: `echo hello
` },
    { title: "Arguments", args: "one 'two three'", code: `echo "$# arguments"
for argument in "$@"; do
    printf '<%s>\\n' "$argument"
done
` },
    { title: "Lines of the input, numbered", stdin: "first\nsecond\nthird\n", code: `number=0
while read -r line; do
    number=$((number + 1))
    printf '\\033[2m%3d\\033[0m %s\\n' "$number" "$line"
done
` },
  ],
};
