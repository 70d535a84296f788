//! Compiles rules for system calls into a BPF program.
//!
//! The kernel runs the program at each system call, and once per existing call number when it is installed. The program
//! finds the number by binary search, so it takes few steps, and looks at arguments only if a rule needs them.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{BpfProgram, sock_filter};

/// Rules by the number of the system call.
pub type Rules = BTreeMap<u32, Rule>;

/// The filter's action for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// The kernel executes the call.
    Allow,
    /// The call is not executed and returns this error; 0 means success.
    Errno(i32),
    /// The kernel notifies init, which decides. Without a listener the call fails with ENOSYS.
    Notify,
}

/// The rule for a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// The same action for all arguments.
    Always(Action),
    /// Allows the call if all checks of at least one list hold. Otherwise takes this action.
    Where(Vec<Vec<Check>>, Action),
}

/// Checks 32 bits of an argument against a set of values. A filter sees registers, but not the memory behind a pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Index of the argument, from 0.
    pub argument: u8,
    /// Whether to check the upper half of its 64 bits instead of the lower half.
    pub upper: bool,
    /// The bits to compare.
    pub mask: u32,
    /// The check holds if the bits equal one of these.
    pub values: Vec<u32>,
    /// The check holds if the bits equal none of `values`.
    pub negated: bool,
}

impl Check {
    /// Whether an argument, of which the kernel uses 32 bits, is one of these values.
    pub fn is(argument: u8, values: &[u32]) -> Check {
        Check { argument, upper: false, mask: u32::MAX, values: values.to_vec(), negated: false }
    }

    /// Whether an argument has none of these bits.
    pub fn without(argument: u8, bits: u32) -> Check {
        Check { argument, upper: false, mask: bits, values: vec![0], negated: false }
    }
}

/// The kernel's audit number of this machine's architecture.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7;

/// Offsets in the kernel's `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Longest distance of a branch, in steps. A branch has 8 bits for it, and an extra jump for either side may come in
/// between.
const MAX_BRANCH: usize = 250;

/// The target of a range of call numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Action(Action),
    Position(Position),
}

/// The position of a step: the number of steps from it to the end of the program, itself included.
type Position = usize;

/// Compiles rules into a program. Numbers without a rule get `default`, including those of x86-64's x32 ABI. A call of
/// another architecture, which has other numbers, fails with ENOSYS. If it killed the process, the kernel would write an
/// audit record each time, at the cost of the host.
pub fn compile(rules: &Rules, default: Action) -> BpfProgram {
    let mut program = Program::default();
    let mut ranges = vec![(0, Target::Action(default))];
    let mut next = 0;
    for (&number, rule) in rules {
        let target = match rule {
            Rule::Always(action) => Target::Action(*action),
            Rule::Where(lists, refused) => Target::Position(program.any_list(lists, *refused)),
        };
        if number > next {
            start_range(&mut ranges, next, Target::Action(default));
        }
        start_range(&mut ranges, number, target);
        next = number + 1;
    }
    start_range(&mut ranges, next, Target::Action(default));

    let search = program.search(&ranges);
    program.jump_to(search);
    let same = program.push(step(LOAD, 0, 0, NUMBER));
    let other = program.push(returns(Action::Errno(libc::ENOSYS)));
    program.branch(EQUAL, ARCHITECTURE, same, other);
    program.push(step(LOAD, 0, 0, ARCH));
    program.steps.reverse();
    program.steps
}

/// Starts a range of numbers with this target. It ends where the next range starts.
fn start_range(ranges: &mut Vec<(u32, Target)>, number: u32, target: Target) {
    match ranges.last_mut() {
        Some((start, last)) if *start == number => *last = target,
        Some((_, last)) if *last == target => {}
        _ => ranges.push((number, target)),
    }
}

/// A program under construction. It is built from its end, because all jumps go forward: so the distance of each jump
/// is known when its step is added.
#[derive(Default)]
struct Program {
    /// The steps in reverse order.
    steps: Vec<sock_filter>,
    /// Position of the latest step for each action. Steps are shared because each one costs time in the kernel's
    /// compiler at every installation.
    actions: BTreeMap<Action, Position>,
}

impl Program {
    /// Adds a step before all others.
    fn push(&mut self, step: sock_filter) -> Position {
        self.steps.push(step);
        self.steps.len()
    }

    /// Number of steps between the next added step and this position.
    fn distance(&self, to: Position) -> usize {
        self.steps.len() - to
    }

    /// Makes the next added step continue at this position, with a jump if necessary.
    fn jump_to(&mut self, position: Position) -> Position {
        match self.distance(position) {
            0 => position,
            // The cast is lossless: the kernel accepts no program of more than 4096 steps.
            distance => self.push(step(JUMP, 0, 0, distance as u32)),
        }
    }

    /// The position itself, or that of a jump to it, so that a branch can reach it.
    fn within_branch(&mut self, position: Position) -> Position {
        if self.distance(position) <= MAX_BRANCH { position } else { self.jump_to(position) }
    }

    fn branch(&mut self, code: u32, value: u32, yes: Position, no: Position) -> Position {
        let (yes, no) = (self.within_branch(yes), self.within_branch(no));
        let (yes, no) = (self.distance(yes) as u8, self.distance(no) as u8);
        self.push(step(code, yes, no, value))
    }

    /// A step for this action that a branch can reach.
    fn action(&mut self, action: Action) -> Position {
        if let Some(&position) = self.actions.get(&action)
            && self.distance(position) <= MAX_BRANCH
        {
            return position;
        }
        let position = self.push(returns(action));
        self.actions.insert(action, position);
        position
    }

    /// Adds a binary search for the range that contains a number.
    fn search(&mut self, ranges: &[(u32, Target)]) -> Position {
        if let [(_, target)] = ranges {
            return match *target {
                Target::Action(action) => self.action(action),
                Target::Position(position) => position,
            };
        }
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let start = upper[0].0;
        let upper = self.search(upper);
        let lower = self.search(lower);
        self.branch(AT_LEAST, start, upper, lower)
    }

    /// Adds steps that allow the call if all checks of at least one list hold.
    fn any_list(&mut self, lists: &[Vec<Check>], refused: Action) -> Position {
        let mut otherwise = self.action(refused);
        for list in lists.iter().rev() {
            let mut holds = self.action(Action::Allow);
            for check in list.iter().rev() {
                holds = self.check(check, holds, otherwise);
            }
            otherwise = holds;
        }
        otherwise
    }

    fn check(&mut self, check: &Check, holds: Position, otherwise: Position) -> Position {
        let (found, mut not_found) = if check.negated { (otherwise, holds) } else { (holds, otherwise) };
        for &value in check.values.iter().rev() {
            not_found = self.branch(EQUAL, value, found, not_found);
        }
        self.jump_to(not_found);
        if check.mask != u32::MAX {
            self.push(step(AND, 0, 0, check.mask));
        }
        // The machine is little-endian: the lower half of a register comes first in memory.
        self.push(step(LOAD, 0, 0, ARGUMENTS + u32::from(check.argument) * 8 + if check.upper { 4 } else { 0 }))
    }
}

fn returns(action: Action) -> sock_filter {
    let value = match action {
        Action::Allow => libc::SECCOMP_RET_ALLOW,
        Action::Notify => libc::SECCOMP_RET_USER_NOTIF,
        Action::Errno(errno) => libc::SECCOMP_RET_ERRNO | (errno.cast_unsigned() & libc::SECCOMP_RET_DATA),
    };
    step(RETURN, 0, 0, value)
}

fn step(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    // The cast is lossless: codes have 16 bits.
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Runs a filter as the kernel would, for a call of this machine's architecture, and returns its action.
    pub fn verdict(filter: &BpfProgram, call: u32, arguments: [u64; 6]) -> Action {
        let (mut position, mut loaded) = (0, 0);
        loop {
            let step = &filter[position];
            position += 1;
            let operation = u32::from(step.code);
            match operation & 0x07 {
                libc::BPF_LD => {
                    loaded = match step.k {
                        NUMBER => call,
                        ARCH => ARCHITECTURE,
                        k => {
                            let at = k - ARGUMENTS;
                            (arguments[(at / 8) as usize] >> (at % 8 * 8)) as u32
                        }
                    }
                }
                libc::BPF_RET if step.k == libc::SECCOMP_RET_ALLOW => return Action::Allow,
                libc::BPF_RET if step.k == libc::SECCOMP_RET_USER_NOTIF => return Action::Notify,
                libc::BPF_RET => return Action::Errno((step.k & libc::SECCOMP_RET_DATA).cast_signed()),
                libc::BPF_ALU => loaded &= step.k,
                libc::BPF_JMP => {
                    let yes = match operation & 0xf0 {
                        libc::BPF_JA => {
                            position += step.k as usize;
                            continue;
                        }
                        libc::BPF_JEQ => loaded == step.k,
                        libc::BPF_JGE => loaded >= step.k,
                        other => panic!("unknown jump {other}"),
                    };
                    position += usize::from(if yes { step.jt } else { step.jf });
                }
                other => panic!("unknown operation {other}"),
            }
        }
    }

    #[test]
    fn each_system_call_number_gets_its_own_action() {
        let only = |value| Rule::Where(vec![vec![Check::is(1, &[value])]], Action::Errno(7));
        // Enough rules for distances that a branch cannot cover.
        let rules: Rules = (0..600).filter(|n| n % 3 != 0).map(|n| (n, only(n))).collect();
        let filter = compile(&rules, Action::Errno(38));
        for call in (0..700).chain([u32::MAX, 0x4000_0000, 0x4000_0001]) {
            for argument in [call, call ^ 1] {
                let expected = match rules.contains_key(&call) {
                    false => Action::Errno(38),
                    true if argument == call => Action::Allow,
                    true => Action::Errno(7),
                };
                let argument = u64::from(argument) | 1 << 40;
                assert_eq!(verdict(&filter, call, [0, argument, 0, 0, 0, 0]), expected, "{call}({argument:#x})");
            }
        }
    }

    #[test]
    fn call_is_allowed_if_any_list_of_checks_holds() {
        let upper = Check { upper: true, ..Check::is(0, &[1, 2]) };
        let not = Check { negated: true, ..Check::is(1, &[3, 4]) };
        let lists = vec![vec![upper, Check::without(0, 0xf0)], vec![not, Check::is(2, &[9])]];
        let rules = Rules::from([(5, Rule::Where(lists, Action::Errno(1)))]);
        let filter = compile(&rules, Action::Errno(38));
        for (first, second, third, allowed) in [
            (0x1_0000_0000, 3, 0, true),
            (0x2_0000_000f, 3, 0, true),
            (0x1_0000_0010, 3, 0, false),
            (0x3_0000_0000, 3, 9, false),
            (0, 5, 9, true),
            (0, 4, 9, false),
            (0, 5, 8, false),
        ] {
            let expected = if allowed { Action::Allow } else { Action::Errno(1) };
            assert_eq!(verdict(&filter, 5, [first, second, third, 0, 0, 0]), expected, "{first:#x} {second} {third}");
        }
    }

    #[test]
    fn adjacent_calls_with_the_same_action_share_one_range() {
        let rules = |from, to| (from..to).map(|n| (n, Rule::Always(Action::Allow))).collect::<Rules>();
        let length = |rules| compile(&rules, Action::Errno(1)).len();
        assert_eq!(length(rules(3, 4)), length(rules(3, 400)));
    }
}
