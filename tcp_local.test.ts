import { afterAll, afterEach, beforeEach, describe, expect, spyOn, test } from "bun:test";
import { readdirSync } from "node:fs";
import type { Socket } from "bun";
import {
  client,
  connect,
  Connection,
  EOFError,
  listen,
  main,
  PORT,
  recvAll,
  repr,
  server,
} from "./tcp_local.ts";

const SCRIPT = `${import.meta.dir}/tcp_local.ts`;
const LOCALHOST = "127.0.0.1";
const HI = Buffer.from("Hi there, server");
const BYE = Buffer.from("Farewell, client");
const USAGE = "usage: tcp_local.ts server|client [host]\n";
const WRONG = [
  [],
  [""],
  ["foo"],
  ["foo", "bar"],
  ["127.0.0.1"],
  ["Server"],
  ["--help"],
  ["server", "x", "y"],
  ["server", "server", "server"],
];

/** A loopback address that no other process has port 1060 of. */
function loopback(): string {
  const octet = () => 1 + Math.floor(Math.random() * 250);
  return `127.${octet()}.${octet()}.${octet()}`;
}

/** The other end of a connection, played by the test. */
class Peer {
  /** How the stream ended: with a FIN, or with a reset. */
  readonly ended = Promise.withResolvers<"end" | "reset">();
  readonly closed = Promise.withResolvers<"end" | "reset">();
  private changed = Promise.withResolvers<void>();
  private readonly pieces: Buffer[] = [];
  private unsent = Buffer.alloc(0);

  static readonly handlers = {
    data: ({ data: peer }: Socket<Peer>, octets: Buffer) => {
      peer.pieces.push(octets);
      peer.wake();
    },
    drain: ({ data: peer }: Socket<Peer>) => peer.flush(),
    end: ({ data: peer }: Socket<Peer>) => peer.ended.resolve("end"),
    close: ({ data: peer }: Socket<Peer>, error?: Error) => {
      peer.ended.resolve(error ? "reset" : "end");
      peer.closed.resolve(error ? "reset" : "end");
      peer.flush();
    },
  };

  static async dial(port: number, host = LOCALHOST): Promise<Peer> {
    const socket = await Bun.connect<Peer>({
      hostname: host,
      port,
      allowHalfOpen: true,
      socket: { ...Peer.handlers, open: (socket) => void (socket.data = new Peer(socket)) },
    });
    return socket.data;
  }

  constructor(readonly socket: Socket<Peer>) {}

  get name(): string {
    return `('${this.socket.localAddress}', ${this.socket.localPort})`;
  }

  get received(): Buffer {
    return Buffer.concat(this.pieces);
  }

  send(octets: Buffer | string): void {
    this.unsent = Buffer.concat([this.unsent, Buffer.from(octets)]);
    this.flush();
  }

  /** Resolves once `length` octets came. */
  async has(length: number): Promise<void> {
    while (this.received.length < length) await this.changed.promise;
  }

  /** What came, once the connection has ended. */
  async all(): Promise<string> {
    await this.ended.promise;
    return this.received.toString("latin1");
  }

  /** Resolves once all that was sent is handed to the kernel, or the connection is gone. */
  async drained(): Promise<void> {
    while (this.unsent.length > 0) await this.changed.promise;
  }

  private flush(): void {
    if (this.unsent.length === 0) return;
    const sent = this.socket.write(this.unsent);
    this.unsent = this.unsent.subarray(sent < 0 ? this.unsent.length : sent);
    this.wake();
  }

  private wake(): void {
    this.changed.resolve();
    this.changed = Promise.withResolvers();
  }
}

/** Listens on a port of its own; `peer` is the end of the first connection that is made to it. */
function peerListens(): { port: number; peer: Promise<Peer>; stop(): void } {
  const { promise, resolve } = Promise.withResolvers<Peer>();
  const listener = Bun.listen<Peer>({
    hostname: LOCALHOST,
    port: 0,
    allowHalfOpen: true,
    socket: {
      ...Peer.handlers,
      open: (socket) => {
        socket.data = new Peer(socket);
        resolve(socket.data);
      },
    },
  });
  listeners.push(listener);
  return { port: listener.port, peer: promise, stop: () => listener.stop(true) };
}

/** A connection of the module's and its other end. */
async function pair(timeout?: number): Promise<[Connection, Peer]> {
  const { port, peer } = peerListens();
  return [await connect(LOCALHOST, port, timeout), await peer];
}

/** Resolves after an exchange between sockets made after all others: what was under way is there. */
async function roundTrip(): Promise<void> {
  const { port, peer, stop } = peerListens();
  const other = await Peer.dial(port);
  (await peer).send("?");
  await other.has(1);
  stop();
}

const listeners: { stop(closeActiveConnections?: boolean): void }[] = [];
afterEach(() => {
  for (const listener of listeners.splice(0)) listener.stop(true);
});

/** What was printed, by this process, since the test began. */
const out: string[] = [];
const err: string[] = [];
let printed = Promise.withResolvers<void>();
const collect = (lines: string[]) => (text: string) => {
  lines.push(...text.split("\n"));
  printed.resolve();
  printed = Promise.withResolvers();
};
async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await printed.promise;
}
const spies = [
  spyOn(console, "log").mockImplementation(collect(out)),
  spyOn(console, "error").mockImplementation(collect(err)),
];
beforeEach(() => {
  out.length = err.length = 0;
});
afterAll(() => spies.forEach((spy) => spy.mockRestore()));

/** The server on a free port, served by this process. */
async function listening(timeout?: number): Promise<number> {
  const listener = await server(LOCALHOST, 0, timeout);
  listeners.push(listener);
  return listener.port;
}

/** The lines of the original for one client. */
function transcript(host: string, port: number, peername: string, message: string): string[] {
  return [
    `We have accepted a connection from ${peername}`,
    `Socket connects ('${host}', ${port}) and ${peername}`,
    `The incoming sixteen-octet message says ${message}`,
    "Reply sent, socket closed",
    `Listening at ('${host}', ${port})`,
  ];
}

/** The command line as a process. */
class Program implements AsyncDisposable {
  out = "";
  err = "";
  private readonly process;
  private readonly streams: Promise<unknown>;
  private changed = Promise.withResolvers<void>();

  constructor(...args: string[]) {
    this.process = Bun.spawn([process.execPath, SCRIPT, ...args], {
      stdout: "pipe",
      stderr: "pipe",
    });
    this.streams = Promise.all([
      this.collect(this.process.stdout, (text) => (this.out += text)),
      this.collect(this.process.stderr, (text) => (this.err += text)),
    ]);
  }

  static async run(...args: string[]): Promise<{ status: number; out: string; err: string }> {
    await using program = new Program(...args);
    const status = await program.exited();
    return { status, out: program.out, err: program.err };
  }

  get pid(): number {
    return this.process.pid;
  }

  kill(signal: NodeJS.Signals): void {
    this.process.kill(signal);
  }

  async exited(): Promise<number> {
    await this.streams;
    return await this.process.exited;
  }

  /** Resolves once `condition` holds of what was printed; fails where it cannot any more. */
  async until(condition: (program: Program) => boolean): Promise<void> {
    while (!condition(this)) {
      const exited = await Promise.race([
        this.changed.promise.then(() => false),
        this.exited().then(() => true),
      ]);
      if (exited && !condition(this)) throw new Error(`ended with ${this.out}${this.err}`);
    }
  }

  /** Resolves once a server listens. */
  async listening(): Promise<this> {
    await this.until((program) => program.out.includes("Listening at"));
    return this;
  }

  private async collect(stream: ReadableStream<Uint8Array>, add: (text: string) => void) {
    const decoder = new TextDecoder();
    for await (const octets of stream) {
      add(decoder.decode(octets, { stream: true }));
      this.changed.resolve();
      this.changed = Promise.withResolvers();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill("SIGKILL");
    await this.exited();
  }
}

describe("recvAll", () => {
  /** A socket that gives `pieces`, then the end of the stream, and notes what it was asked for. */
  function scripted(pieces: Buffer[]) {
    const asked: number[] = [];
    const recv = async (maxLength: number) => {
      asked.push(maxLength);
      return pieces.shift() ?? Buffer.alloc(0);
    };
    return { asked, recv };
  }

  /** `octets` in pieces, with a cut after every octet whose bit is set in `cuts`. */
  function cut(octets: Buffer, cuts: number): Buffer[] {
    const pieces: Buffer[] = [];
    let start = 0;
    for (let end = 1; end <= octets.length; end++) {
      if (end < octets.length && !(cuts & (1 << (end - 1)))) continue;
      pieces.push(octets.subarray(start, end));
      start = end;
    }
    return pieces;
  }

  test("puts a message together from every one of the 32,768 ways to cut it", async () => {
    for (let cuts = 0; cuts < 2 ** 15; cuts++) {
      const pieces = cut(HI, cuts);
      let missing = 16;
      const asks = pieces.map((piece) => (missing -= piece.length) + piece.length);
      const sock = scripted([...pieces]);
      const message = await recvAll(sock, 16);
      if (!message.equals(HI)) expect([cuts, message]).toEqual([cuts, HI]);
      if (!Bun.deepEquals(sock.asked, asks)) expect([cuts, sock.asked]).toEqual([cuts, asks]);
    }
  });

  test("says how far it got when the stream ends early", async () => {
    for (let length = 0; length < 16; length++) {
      const error = await recvAll(scripted(cut(HI.subarray(0, length), 0b100100)), 16).catch(
        (e) => e,
      );
      expect(error).toBeInstanceOf(EOFError);
      expect(error.name).toBe("EOFError");
      expect(error.message).toBe(`socket closed ${length} bytes into a 16-byte message`);
      expect(error.partial).toEqual(HI.subarray(0, length));
      expect(error.expected).toBe(16);
    }
  });

  test("reads nothing for a message of no octets", async () => {
    const sock = scripted([HI]);
    expect(await recvAll(sock, 0)).toEqual(Buffer.alloc(0));
    expect(sock.asked).toEqual([]);
  });

  test.each([-1, 1.5, NaN, Infinity])(
    "refuses a length of %p and reads nothing",
    async (length) => {
      const sock = scripted([HI]);
      await expect(recvAll(sock, length)).rejects.toBeInstanceOf(RangeError);
      expect(sock.asked).toEqual([]);
    },
  );

  test("passes an error on as it is", async () => {
    const error = new Error("no luck");
    expect(await recvAll({ recv: () => Promise.reject(error) }, 16).catch((e) => e)).toBe(error);
  });

  test("gives a buffer that is the caller's own", async () => {
    const piece = Buffer.from(HI);
    const message = await recvAll(scripted([piece]), 16);
    piece.fill(0);
    expect(message).toEqual(HI);
    expect(message.buffer.byteLength).toBe(16);
  });

  test("copies 64 MiB that came in small pieces once", async () => {
    const piece = Buffer.alloc(4096, "x");
    const start = performance.now();
    const data = await recvAll({ recv: async () => piece }, 2 ** 26);
    expect(data.equals(Buffer.alloc(2 ** 26, "x"))).toBeTrue();
    // Concatenation would copy 512 GiB.
    expect(performance.now() - start).toBeLessThan(4000);
  });
});

describe("repr", () => {
  test("shows every octet as Python does", () => {
    const controls =
      String.raw`\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f` +
      String.raw`\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f`;
    const printable =
      String.raw` !"#$%&\'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_` +
      "`abcdefghijklmnopqrstuvwxyz{|}~";
    const high = Array.from({ length: 129 }, (_, i) => `\\x${(127 + i).toString(16)}`).join("");
    const octets = Uint8Array.from({ length: 256 }, (_, octet) => octet);
    expect(repr(octets)).toBe(`'${controls}${printable}${high}'`);
  });

  test.each([
    ["", `''`],
    ["plain", `'plain'`],
    ["it's", `"it's"`],
    ['say "hi"', `'say "hi"'`],
    [`it's "hi"`, String.raw`'it\'s "hi"'`],
    ["it's a \\ \n", String.raw`"it's a \\ \n"`],
    ["\x1b[2J\x7f\xff", String.raw`'\x1b[2J\x7f\xff'`],
    [`'"'`, String.raw`'\'"\''`],
  ])("quotes %j as Python does", (text, shown) => {
    expect(repr(Buffer.from(text, "latin1"))).toBe(shown);
  });

  test("shows a part of a larger buffer", () => {
    expect(repr(new Uint8Array(HI.buffer, HI.byteOffset + 3, 5))).toBe("'there'");
  });
});

describe("Connection", () => {
  test("has the names of both ends", async () => {
    const [s, peer] = await pair();
    expect([s.sockname.host, s.sockname.port]).toEqual([LOCALHOST, peer.socket.remotePort]);
    expect(`${s.peername}`).toBe(peer.name);
  });

  test("recv gives what there is, and keeps what was not asked for", async () => {
    const [s, peer] = await pair();
    const first = s.recv(100);
    peer.send("abcdef");
    expect(`${await first}`).toBe("abcdef");
    peer.send("ghijkl");
    expect(`${await s.recv(2)}`).toBe("gh");
    expect(`${await s.recv(1)}`).toBe("i");
    expect(`${await s.recv(100)}`).toBe("jkl");
  });

  test("gives two messages that came in one piece, one after the other", async () => {
    const [s, peer] = await pair();
    peer.send(Buffer.concat([HI, BYE, HI.subarray(0, 3)]));
    expect(await recvAll(s, 16)).toEqual(HI);
    expect(await recvAll(s, 16)).toEqual(BYE);
    expect(`${await s.recv(16)}`).toBe("Hi ");
  });

  test("gives what came before the end of the stream, and then nothing, again and again", async () => {
    const [s, peer] = await pair();
    peer.send("last");
    peer.socket.shutdown();
    await roundTrip();
    expect(`${await s.recv(2)}${await s.recv(2)}`).toBe("last");
    expect(await s.recv(16)).toBeEmpty();
    expect(await s.recv(16)).toBeEmpty();
  });

  test("gives what came before a reset, and then the error, again and again", async () => {
    const [s, peer] = await pair();
    peer.send("last");
    await roundTrip();
    peer.socket.terminate();
    await roundTrip();
    expect(`${await s.recv(2)}${await s.recv(2)}`).toBe("last");
    const error = { code: "ECONNRESET", message: "connection reset by peer" };
    await expect(s.recv(16)).rejects.toMatchObject(error);
    await expect(s.recv(16)).rejects.toMatchObject(error);
  });

  test("tells a pending recv of a reset", async () => {
    const [s, peer] = await pair();
    const pending = s.recv(16);
    peer.socket.terminate();
    await expect(pending).rejects.toMatchObject({ code: "ECONNRESET" });
  });

  test("takes the end of the stream for the end, even if a reset follows", async () => {
    const [s, peer] = await pair();
    peer.socket.shutdown();
    await roundTrip();
    peer.socket.terminate();
    await roundTrip();
    expect(await s.recv(16)).toBeEmpty();
  });

  test("lets unread octets wait with the peer, and loses none", async () => {
    const [s, peer] = await pair();
    const octets = Buffer.alloc(2 ** 26, "0123456789abcde");
    peer.send(octets);
    let sent;
    do {
      sent = peer.socket.bytesWritten;
      for (let round = 0; round < 10; round++) await roundTrip();
    } while (peer.socket.bytesWritten > sent);
    expect(sent).toBeLessThan(2 ** 25);
    expect((await recvAll(s, octets.length)).equals(octets)).toBeTrue();
  });

  test("puts pieces that came unread in a row", async () => {
    const [s, peer] = await pair();
    for (const piece of ["ab", "cd", "ef"]) {
      peer.send(piece);
      await roundTrip();
    }
    expect(`${await recvAll(s, 6)}`).toBe("abcdef");
    peer.send("gh");
    expect(`${await s.recv(16)}`).toBe("gh");
  });

  test("refuses a second recv while one is pending, and the first goes on", async () => {
    const [s, peer] = await pair();
    const first = s.recv(16);
    await expect(s.recv(16)).rejects.toThrow("recv called while another recv is pending");
    peer.send("here");
    expect(`${await first}`).toBe("here");
  });

  test.each([0, -1, 1.5, NaN])("refuses to receive %p octets", async (maxLength) => {
    const [s, peer] = await pair();
    await expect(s.recv(maxLength)).rejects.toBeInstanceOf(RangeError);
    peer.send("here");
    expect(`${await s.recv(16)}`).toBe("here");
  });

  test("sendAll goes on after a short write, whatever else is sent meanwhile", async () => {
    const [s, peer] = await pair();
    peer.socket.pause();
    const octets = Buffer.alloc(2 ** 24, "0123456789abcde");
    let sent = false;
    const first = s.sendAll(octets).then(() => (sent = true));
    const others = [s.sendAll("ünd"), s.sendAll(Buffer.alloc(0)), s.sendAll(HI)];
    await roundTrip();
    expect(sent).toBeFalse();
    peer.socket.resume();
    await Promise.all([first, ...others]);
    s.close();
    await peer.ended.promise;
    expect(peer.received.equals(Buffer.concat([octets, Buffer.from("ünd"), HI]))).toBeTrue();
  });

  test("sendAll goes on in the middle of a string", async () => {
    const [s, peer] = await pair();
    peer.socket.pause();
    const text = "€uro".repeat(2 ** 21);
    const sent = s.sendAll(text);
    await roundTrip();
    peer.socket.resume();
    await sent;
    s.close();
    expect(Buffer.from(await peer.all(), "latin1").equals(Buffer.from(text))).toBeTrue();
  });

  test("sends to a peer that has closed its side", async () => {
    const [s, peer] = await pair();
    peer.socket.shutdown();
    expect(await s.recv(16)).toBeEmpty();
    await s.sendAll(HI);
    s.close();
    expect(await peer.all()).toBe("Hi there, server");
  });

  test("sendAll rejects when the peer resets, at once and later", async () => {
    const [s, peer] = await pair();
    peer.socket.pause();
    const pending = s.sendAll(Buffer.alloc(2 ** 24)).catch((e) => e);
    await roundTrip();
    peer.socket.terminate();
    for (const error of [await pending, await s.sendAll(HI).catch((e) => e)]) {
      expect([error.code, error.message]).toEqual([
        "ECONNRESET",
        expect.stringContaining("connection reset by peer"),
      ]);
    }
  });

  test("close is idempotent, and whatever waits or comes after it rejects", async () => {
    const [s, peer] = await pair();
    peer.socket.pause();
    const pending = [s.recv(16), s.sendAll(Buffer.alloc(2 ** 24)), s.sendAll(HI)];
    await roundTrip();
    s.close();
    s.close();
    for (const call of [...pending, s.recv(16), s.sendAll(HI)]) {
      expect(await call.catch((e) => [e.code, e.message])).toEqual([
        "EBADF",
        "the connection is closed",
      ]);
    }
  });

  test("what was sent arrives when more than was read is there at the close", async () => {
    const [s, peer] = await pair();
    peer.send(Buffer.alloc(2 ** 24));
    await recvAll(s, 16);
    await roundTrip();
    await s.sendAll(BYE);
    s.close();
    s.close();
    expect(await peer.all()).toBe("Farewell, client");
    await peer.drained();
    peer.socket.shutdown();
    expect(await peer.closed.promise).toBe("end");
  });

  test("close leaves nothing open when nothing is unread", async () => {
    const [s, peer] = await pair();
    s.close();
    expect(await peer.all()).toBe("");
    peer.send("?");
    expect(await peer.closed.promise).toBe("reset");
  });

  test.each([
    ["has", "nothing behind", 16, 16],
    ["lives until its octets are with the peer and has", "a surplus", 17, 2 ** 24],
  ])(
    "a process that %s closed a connection with %s ends",
    async (_, _surplus, comes, goes) => {
      const { port, peer } = peerListens();
      const code = `import { connect, recvAll } from "./tcp_local.ts";
      const s = await connect("${LOCALHOST}", ${port});
      await recvAll(s, 16);
      await s.sendAll(Buffer.alloc(${goes}));
      s.close();`;
      const program = Bun.spawn([process.execPath, "-e", code], { cwd: import.meta.dir });
      (await peer).send(Buffer.alloc(comes));
      expect((await (await peer).all()).length).toBe(goes);
      (await peer).socket.end();
      expect(await program.exited).toBe(0);
    },
    3000,
  );
});

describe("connect", () => {
  test.each([
    ["localhost", "('127.0.0.1', 1)"],
    ["127.1", "('127.0.0.1', 1)"],
    ["0x7f000001", "('127.0.0.1', 1)"],
    ["127.0.0.1", "('127.0.0.1', 1)"],
    ["127.250.209.199", "('127.250.209.199', 1)"],
    ["127.0.0.01", "('127.0.0.1', 1)"],
    ["127.0.0.010", "('127.0.0.8', 1)"],
    ["", "('0.0.0.0', 1)"],
  ])("finds %j, and says in words that it refused", async (host, name) => {
    await expect(connect(host, 1)).rejects.toMatchObject({
      message: `cannot connect to ${name}: connection refused or host unreachable`,
      code: "ECONNREFUSED",
    });
  });

  test.each([
    ["nosuch.invalid", "'nosuch.invalid': name or service not known"],
    ["127.0.0.256", "'127.0.0.256': name or service not known"],
    ["it's\x1b[2J", `"it's\\x1b[2J": name or service not known`],
    ["::1", "'::1': address family for hostname not supported"],
  ])("says in words why %j does not resolve", async (host, why) => {
    await expect(connect(host)).rejects.toThrow(`cannot resolve ${why}`);
    await expect(server(host)).rejects.toThrow(`cannot resolve ${why}`);
  });

  test("refuses a port that is none", async () => {
    await expect(connect(LOCALHOST, 65536)).rejects.toThrow(
      "cannot connect to ('127.0.0.1', 65536): ",
    );
    await expect(server(LOCALHOST, -1)).rejects.toThrow("cannot listen at ('127.0.0.1', -1): ");
  });

  test("gives what a server said before it was asked", async () => {
    const { port, peer } = peerListens();
    const connecting = connect(LOCALHOST, port);
    (await peer).send("Welcome");
    await roundTrip();
    expect(`${await recvAll(await connecting, 7)}`).toBe("Welcome");
  });
});

describe("server", () => {
  test("prints what the original does for clients one after another", async () => {
    const port = await listening();
    const lines = [`Listening at ('127.0.0.1', ${port})`];
    for (const [message, shown] of [
      ["Hi there, server", `'Hi there, server'`],
      ["it's \x1b[2J\x00\n\xff 567", String.raw`"it's \x1b[2J\x00\n\xff 567"`],
    ] as const) {
      const peer = await Peer.dial(port);
      const { name } = peer;
      peer.send(Buffer.from(message, "latin1"));
      expect(await peer.all()).toBe("Farewell, client");
      expect(await peer.ended.promise).toBe("end");
      lines.push(...transcript(LOCALHOST, port, name, shown));
      peer.socket.end();
    }
    expect(out).toEqual(lines);
    expect(err).toEqual([]);
  });

  test("serves a message however it is cut in two, and an octet at a time", async () => {
    const port = await listening();
    const cuts = [...HI.keys()].map((cut) => [HI.subarray(0, cut), HI.subarray(cut)]);
    for (const pieces of [...cuts, [...HI].map((octet) => Buffer.of(octet))]) {
      const peer = await Peer.dial(port);
      for (const piece of pieces) {
        peer.send(piece);
        await roundTrip();
      }
      expect(await peer.all()).toBe("Farewell, client");
    }
  });

  test("replies to a client that has closed its side", async () => {
    const peer = await Peer.dial(await listening());
    peer.send(HI);
    peer.socket.shutdown();
    expect(await peer.all()).toBe("Farewell, client");
  });

  test.each([1, 100, 70_000])("replies, then closes, when %p octets follow", async (surplus) => {
    const port = await listening();
    for (const pieces of [
      [Buffer.concat([HI, Buffer.alloc(surplus)])],
      [HI, Buffer.alloc(surplus)],
    ]) {
      const peer = await Peer.dial(port);
      for (const piece of pieces) peer.send(piece);
      expect(await peer.all()).toBe("Farewell, client");
      expect(await peer.ended.promise).toBe("end");
      peer.socket.end();
    }
    expect(err).toEqual([]);
  });

  test("serves clients side by side", async () => {
    const port = await listening();
    const stalled = await Promise.all(Array.from({ length: 50 }, () => Peer.dial(port)));
    for (const peer of stalled) peer.send("Hi ");
    const other = await Peer.dial(port);
    other.send(HI);
    expect(await other.all()).toBe("Farewell, client");
    for (const peer of stalled) peer.send("there, server");
    for (const peer of stalled) expect(await peer.all()).toBe("Farewell, client");
  });

  test("says in one line which client ended early, and serves the next", async () => {
    const port = await listening();
    for (let length = 0; length < 16; length++) {
      const [ends, resets] = [await Peer.dial(port), await Peer.dial(port)];
      const names = [ends.name, resets.name];
      for (const peer of [ends, resets]) peer.send(HI.subarray(0, length));
      await roundTrip();
      ends.socket.shutdown();
      expect(await ends.all()).toBe("");
      resets.socket.terminate();
      await until(() => err.length >= 2);
      expect(err.splice(0)).toEqual([
        `${names[0]}: socket closed ${length} bytes into a 16-byte message`,
        `${names[1]}: connection reset by peer`,
      ]);
      const next = await Peer.dial(port);
      next.send(HI);
      expect(await next.all()).toBe("Farewell, client");
    }
  });

  test("says so when a client was gone before it had a name, and serves the next", async () => {
    const port = await listening();
    const code = `for (const _ of "123") (await Bun.connect({ hostname: "${LOCALHOST}", port: ${port},
      socket: { data() {} } })).terminate();`;
    // While this process waits for the other, it accepts nobody.
    Bun.spawnSync([process.execPath, "-e", code]);
    await until(() => err.length >= 3);
    expect(err).toEqual(Array(3).fill("a client: connection reset by peer"));
    const next = await Peer.dial(port);
    next.send(HI);
    expect(await next.all()).toBe("Farewell, client");
  });

  test("says why it cannot listen", async () => {
    const port = await listening();
    await expect(server(LOCALHOST, port)).rejects.toMatchObject({
      message: `cannot listen at ('127.0.0.1', ${port}): address already in use`,
      code: "EADDRINUSE",
    });
    await expect(server("192.0.2.1")).rejects.toThrow(
      "cannot listen at ('192.0.2.1', 1060): address not available",
    );
  });
});

describe("client", () => {
  /** What the client fails with, if it does, when its server does what `play` does. */
  async function against(play: (peer: Peer) => void | Promise<void>): Promise<string | undefined> {
    const { port, peer } = peerListens();
    const failure = client(LOCALHOST, port).then(
      () => undefined,
      (error: Error) => error.message,
    );
    await play(await peer);
    const message = await failure;
    await (
      await peer
    ).ended.promise;
    return message;
  }

  test.each<[string, (peer: Peer) => void | Promise<void>]>([
    [
      "an octet at a time",
      async (peer) => {
        for (const octet of BYE) {
          peer.send(Buffer.of(octet));
          await roundTrip();
        }
      },
    ],
    ["before it was asked for", (peer) => peer.send(BYE)],
    ["with a long tail", (peer) => peer.send(Buffer.concat([BYE, Buffer.alloc(2 ** 22)]))],
  ])("prints a reply that comes %s", async (_, play) => {
    expect(await against(play)).toBeUndefined();
    expect(out).toEqual([
      expect.stringMatching(/^Client has been assigned socket name \('127\.0\.0\.1', \d+\)$/),
      "The server said 'Farewell, client'",
    ]);
  });

  test("says which server ended early, and after how much", async () => {
    for (let length = 0; length < 16; length++) {
      const ended = await against(async (peer) => {
        await peer.has(16);
        peer.send(BYE.subarray(0, length));
        peer.socket.shutdown();
      });
      expect(ended).toBe(`socket closed ${length} bytes into a 16-byte message`);
      const reset = await against(async (peer) => {
        await peer.has(16);
        peer.send(BYE.subarray(0, length));
        peer.socket.terminate();
      });
      expect(reset).toBe("connection reset by peer");
    }
    expect(out.filter((line) => line.includes("said"))).toBeEmpty();
  });
});

test("a stalled peer is let go, and not before its time", async () => {
  const timeout = 0.3;
  const start = performance.now();
  const port = await listening(timeout);
  const stalled = [await Peer.dial(port), await Peer.dial(port)];
  stalled[1]?.send("Hi ");
  const names = stalled.map((peer) => peer.name);
  const [quiet, silent] = await pair(timeout);
  const [sending, deaf] = await pair(timeout);
  deaf.socket.pause();
  const sends = [sending.sendAll(Buffer.alloc(2 ** 24)), sending.sendAll("?")];
  for (const wait of await Promise.allSettled([quiet.recv(16), ...sends, sending.recv(16)])) {
    expect(wait).toMatchObject({ reason: { code: "ETIMEDOUT", message: "timed out" } });
  }
  expect(performance.now() - start).toBeWithin(300, 3000);
  expect(await Promise.all(stalled.map((peer) => peer.all()))).toEqual(["", ""]);
  expect(err.toSorted()).toEqual(names.map((name) => `${name}: timed out`).toSorted());

  silent.send("here after all");
  expect(`${await quiet.recv(16)}`).toBe("here after all");
  deaf.socket.resume();
  await sending.sendAll("?");
});

describe("what must not go wrong again", () => {
  test("of two recvAll in one tick the second is refused, and the first gets its message", async () => {
    const [s, peer] = await pair();
    peer.send(HI.subarray(0, 10));
    await roundTrip();
    const both = Promise.allSettled([recvAll(s, 16), recvAll(s, 16)]);
    peer.send(Buffer.concat([HI.subarray(10), BYE]));
    const [first, second] = await both;
    expect(first).toEqual({ status: "fulfilled", value: HI });
    expect(second).toMatchObject({
      reason: { message: "recv called while another recv is pending" },
    });
    expect(await recvAll(s, 16)).toEqual(BYE);
  });

  test("however late in the tick a second recvAll comes, the first gets its message", async () => {
    for (let turns = 0; turns < 8; turns++) {
      const [s, peer] = await pair();
      peer.send(HI.subarray(0, 10));
      await roundTrip();
      const first = recvAll(s, 16);
      for (let turn = 0; turn < turns; turn++) await null;
      await expect(s.recv(16)).rejects.toThrow("another recv is pending");
      peer.send(HI.subarray(10));
      expect(await first).toEqual(HI);
    }
  });

  test("sendAll goes on while a slow peer reads", async () => {
    const [s, peer] = await pair(0.25);
    peer.socket.pause();
    const start = performance.now();
    const sent = s.sendAll(Buffer.alloc(6 * 2 ** 20)).then(() => performance.now() - start);
    // About a piece of 512 KiB each 150 ms: the kernel wakes a writer later than the timeout.
    const reading = setInterval(() => {
      const before = peer.received.length;
      peer.socket.resume();
      void peer.has(before + 1).then(() => peer.socket.pause());
    }, 150);
    expect(await sent).toBeGreaterThan(500);
    clearInterval(reading);
  }, 10_000);

  test("what recv gives shares no memory with what is still unread", async () => {
    const [s, peer] = await pair();
    peer.send("abcdef");
    await roundTrip();
    const two = await s.recv(2);
    structuredClone(two.buffer, { transfer: [two.buffer as ArrayBuffer] });
    expect(`${await s.recv(16)}`).toBe("cdef");
  });

  test("a byte that is kept keeps no more than itself alive", async () => {
    const [s, peer] = await pair();
    peer.send(Buffer.alloc(500_000));
    await roundTrip();
    expect((await s.recv(1)).buffer.byteLength).toBe(1);
    const rest = await s.recv(2 ** 20);
    expect(rest.buffer.byteLength).toBe(rest.length);
  });

  test("a reset that sendAll met first is no end of the stream", async () => {
    const [s, peer] = await pair();
    peer.send("last");
    peer.socket.terminate();
    // Nothing is received before the next turn of the loop, so the write meets the reset.
    const sent = s.sendAll(HI);
    await expect(sent).rejects.toMatchObject({ code: "ECONNRESET" });
    expect(`${await s.recv(16)}`).toBe("last");
    await expect(s.recv(16)).rejects.toMatchObject({ code: "ECONNRESET" });
  });

  test("what was sent arrives when the surplus is still in the kernel at the close", async () => {
    const [s, peer] = await pair();
    for (const piece of ["ab", "cd", "ef", "gh"]) {
      peer.send(piece);
      await roundTrip();
    }
    expect(`${await s.recv(16)}`).toBe("abcd");
    peer.socket.pause();
    await s.sendAll(Buffer.alloc(200_000));
    s.close();
    await roundTrip();
    peer.socket.resume();
    expect((await peer.all()).length).toBe(200_000);
    expect(await peer.ended.promise).toBe("end");
    peer.socket.end();
  });

  test("a connection that this process cuts off does not look like an end", async () => {
    const served = Promise.withResolvers<unknown>();
    const listener = await listen(LOCALHOST, 0, (sc) =>
      recvAll(sc, 16).then(
        () => served.resolve("a message"),
        (error) => served.resolve(error),
      ),
    );
    const peer = await Peer.dial(listener.port);
    peer.send("12345678");
    await roundTrip();
    listener.stop(true);
    expect(await served.promise).toMatchObject({
      code: "ECONNABORTED",
      message: "the connection was cut off",
    });
  });

  test.each([[{}], [undefined], ["a string"], [new ArrayBuffer(4)], [new Uint16Array(4)]])(
    "recvAll rejects where recv gives %p",
    async (given) => {
      const recv = async () => given as unknown as Uint8Array;
      await expect(recvAll({ recv }, 16)).rejects.toBeInstanceOf(TypeError);
    },
  );

  test.each<[string, (bytes: Uint8Array<ArrayBuffer>) => NodeJS.ArrayBufferView]>([
    ["Uint16Array", ({ buffer }) => new Uint16Array(buffer, 2, 2 ** 23 - 1)],
    ["DataView", ({ buffer }) => new DataView(buffer, 2, 2 ** 24 - 2)],
  ])("sendAll sends every byte of a %s", async (_, view) => {
    const [s, peer] = await pair();
    const bytes = new Uint8Array(2 ** 24).map((_, i) => i % 251);
    peer.socket.pause();
    const sent = s.sendAll(view(bytes));
    await roundTrip();
    peer.socket.resume();
    await sent;
    s.close();
    await peer.ended.promise;
    expect(peer.received.equals(bytes.subarray(2))).toBeTrue();
  });

  test("bytes that came while the process was busy came in time", async () => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    const s = await connect(host, PORT, 0.1);
    await s.sendAll(HI);
    const { port, peer } = peerListens();
    const other = await Peer.dial(port);
    (await peer).send("?");
    const reply = recvAll(s, 16);
    // In the turn of another socket the timer is the first to be looked at.
    await other.has(1);
    const start = performance.now();
    while (performance.now() - start < 300);
    expect(await reply).toEqual(BYE);
    await program.until(({ out }) => out.includes("Reply sent"));
    s.close();
  });

  test("the look-up counts as connecting", async () => {
    const answer = Promise.withResolvers<never>();
    const lookup = spyOn(Bun.dns, "lookup").mockImplementation(() => answer.promise);
    const start = performance.now();
    await expect(connect("name", 1, 0.1)).rejects.toMatchObject({
      message: "cannot connect to ('name', 1): timed out",
      code: "ETIMEDOUT",
    });
    expect(performance.now() - start).toBeWithin(90, 2000);
    answer.reject(new Error("too late"));
    lookup.mockRestore();
  });

  test("the peer's half-close does not start the wait of a sendAll again", async () => {
    const [s, peer] = await pair(0.5);
    peer.socket.pause();
    // Once this has timed out, every buffer on the way is full.
    await expect(s.sendAll(Buffer.alloc(2 ** 24))).rejects.toMatchObject({ code: "ETIMEDOUT" });
    const start = performance.now();
    const sent = s.sendAll(HI).catch((e) => e);
    setTimeout(() => peer.socket.shutdown(), 400);
    expect(await sent).toMatchObject({ code: "ETIMEDOUT" });
    expect(performance.now() - start).toBeWithin(450, 850);
  });

  test("says in words that there is no name server, and that a look-up found nothing", async () => {
    const lookup = spyOn(Bun.dns, "lookup");
    const offline = Object.assign(new Error("getaddrinfo EAI_AGAIN"), { code: "DNS_EAI_AGAIN" });
    lookup.mockImplementationOnce(() => Promise.reject(offline));
    await expect(connect("name")).rejects.toThrow(
      "cannot resolve 'name': temporary failure in name resolution",
    );
    lookup.mockImplementationOnce(async () => []);
    await expect(connect("name")).rejects.toThrow(
      "cannot resolve 'name': name or service not known",
    );
    lookup.mockRestore();
  });

  test("using closes a connection, also after an error", async () => {
    const { port, peer } = peerListens();
    const failing = (async () => {
      using _ = await connect(LOCALHOST, port);
      throw new Error("no luck");
    })();
    await expect(failing).rejects.toThrow("no luck");
    expect(await (await peer).all()).toBe("");
  });
});

describe("listen", () => {
  test("says in one line for which client serve failed and why, and serves the others", async () => {
    const failures: (() => void | Promise<void>)[] = [
      () => Promise.reject(new Error("rejected\nin two lines")),
      () => {
        throw "thrown";
      },
    ];
    const listener = await listen(LOCALHOST, 0, async (sc) => {
      await failures.shift()?.();
      await sc.sendAll("served");
    });
    listeners.push(listener);
    for (const why of ["rejected in two lines", "thrown"]) {
      const peer = await Peer.dial(listener.port);
      const { name } = peer;
      expect(await peer.all()).toBe("");
      expect(err.splice(0)).toEqual([`${name}: ${why}`]);
    }
    expect(await (await Peer.dial(listener.port)).all()).toBe("served");
    expect(err).toEqual([]);
  });

  test("closes the connection when a serve that is no promise returns", async () => {
    const listener = await listen(LOCALHOST, 0, () => {});
    listeners.push(listener);
    expect(await (await Peer.dial(listener.port)).all()).toBe("");
  });
});

test("each wait is bounded, not the whole", async () => {
  const [s, peer] = await pair(0.5);
  const start = performance.now();
  const message = recvAll(s, 16);
  const trickle = setInterval(() => peer.send("."), 50);
  expect(`${await message}`).toBe(".".repeat(16));
  clearInterval(trickle);
  expect(performance.now() - start).toBeGreaterThan(500);
});

test("a timeout of Infinity is none", async () => {
  const [s, peer] = await pair(Infinity);
  const pending = s.recv(16);
  for (let round = 0; round < 30; round++) await roundTrip();
  peer.send("here");
  expect(`${await pending}`).toBe("here");
});

test("a peer that sends on after the close is cut off in the end", async () => {
  const [s, peer] = await pair(Infinity);
  peer.send(Buffer.alloc(17));
  await recvAll(s, 16);
  s.close();
  const start = performance.now();
  const sending = setInterval(() => peer.send("?"), 100);
  expect(await peer.closed.promise).toBe("reset");
  clearInterval(sending);
  expect(performance.now() - start).toBeGreaterThan(3500);
}, 10_000);

describe("main", () => {
  test("takes everything but server and client, and a host, for a wrong usage", async () => {
    for (const args of WRONG) expect(await main(args)).toBe(2);
    expect(err).toEqual(WRONG.map(() => USAGE.trim()));
  });

  test("serves, has an exchange, and resolves to the exit status", async () => {
    const host = loopback();
    void main(["server", host]);
    await until(() => out.length >= 1);
    expect(await main(["client", host])).toBe(0);
    await until(() => out.length >= 8);
    expect(out).toContain("The server said 'Farewell, client'");
    expect(await main(["server", host])).toBe(1);
    expect(err).toEqual([
      `tcp_local.ts: cannot listen at ('${host}', 1060): address already in use`,
    ]);
  });
});

describe("the command line", () => {
  test.each(WRONG.map((args) => [args]))("%j is a wrong usage", async (args) => {
    expect(await Program.run(...args)).toEqual({ status: 2, out: "", err: USAGE });
  });

  // Somebody may hold port 1060 of these addresses: that it is refused shows as well which it was.
  test.each([
    [["server"], "127.0.0.1"],
    [["server", ""], "0.0.0.0"],
    [["server", "localhost"], "127.0.0.1"],
    [["server", "127.1"], "127.0.0.1"],
    [["server", "0x7f000001"], "127.0.0.1"],
  ])("%j listens at %p", async (args, host) => {
    await using program = new Program(...args);
    await program.until(({ out, err }) => `${out}${err}`.endsWith("\n"));
    expect(`${program.out}${program.err}`).toBeOneOf([
      `Listening at ('${host}', 1060)\n`,
      `tcp_local.ts: cannot listen at ('${host}', 1060): address already in use\n`,
    ]);
  });

  test.each([
    [["client"]],
    [["client", "127.0.0.1"]],
    [["client", "localhost"]],
    [["client", "127.1"]],
  ])("%j talks to ('127.0.0.1', 1060)", async (args) => {
    const { out, err } = await Program.run(...args);
    expect(out + err).toMatch(
      /^Client has been assigned socket name \('127\.0\.0\.1', \d+\)\n|^tcp_local\.ts: cannot connect to \('127\.0\.0\.1', 1060\): /,
    );
  });

  test.each([
    [["server", "server"], "cannot resolve 'server': name or service not known"],
    [["client", "client"], "cannot resolve 'client': name or service not known"],
    [["server", "::1"], "cannot resolve '::1': address family for hostname not supported"],
    [["client", "nosuch.invalid"], "cannot resolve 'nosuch.invalid': name or service not known"],
    [["server", "192.0.2.1"], "cannot listen at ('192.0.2.1', 1060): address not available"],
  ])("%j is an error in one line", async (args, error) => {
    expect(await Program.run(...args)).toEqual({
      status: 1,
      out: "",
      err: `tcp_local.ts: ${error}\n`,
    });
  });

  test("a client that nobody listens to says so in one line", async () => {
    const host = loopback();
    expect(await Program.run("client", host)).toEqual({
      status: 1,
      out: "",
      err: `tcp_local.ts: cannot connect to ('${host}', 1060): connection refused or host unreachable\n`,
    });
  });

  test("both sides print what the original does", async () => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    let expected = `Listening at ('${host}', 1060)\n`;
    for (let round = 0; round < 2; round++) {
      const { status, out, err } = await Program.run("client", host);
      const [, name] =
        /^Client has been assigned socket name (\('127\.0\.0\.1', \d+\))\n/.exec(out) ?? [];
      expect({ status, out, err }).toEqual({
        status: 0,
        out: `Client has been assigned socket name ${name}\nThe server said 'Farewell, client'\n`,
        err: "",
      });
      expected += transcript(host, PORT, `${name}`, "'Hi there, server'").join("\n") + "\n";
    }
    await program.until(({ out }) => out.length >= expected.length);
    expect(program.out).toBe(expected);
    const second = await Program.run("server", host);
    expect(second.err).toBe(
      `tcp_local.ts: cannot listen at ('${host}', 1060): address already in use\n`,
    );
    expect([second.status, second.out, program.err]).toEqual([1, "", ""]);
  });

  describe("the README", () => {
    /** The programs that it prints, made to talk to `host`. */
    async function programs(host: string): Promise<string[]> {
      const readme = await Bun.file(`${import.meta.dir}/README.md`).text();
      const blocks = readme.matchAll(/```ts\n(import [^`]*(?:`[^`\n]+`[^`]*)*)```/g);
      return [...blocks].map(([, block]) => `${block}`.replaceAll("127.0.0.1", host));
    }

    test("has a client that talks to the server", async () => {
      const host = loopback();
      await using _ = await new Program("server", host).listening();
      const [script] = await programs(host);
      const { stdout, stderr } = Bun.spawnSync([process.execPath, "-e", `${script}`], {
        cwd: import.meta.dir,
      });
      expect(`${stdout}${stderr}`).toBe("Farewell, client\n");
    });

    test("has a server for messages with their length in front", async () => {
      const host = loopback();
      const [, script] = await programs(host);
      const code = `${script}\nconsole.log("listening");`;
      const program = Bun.spawn([process.execPath, "-e", code], {
        cwd: import.meta.dir,
        stderr: "pipe",
      });
      await program.stdout.getReader().read();
      const peer = await Peer.dial(1061, host);
      const messages = Buffer.from("\0\0\0\x05first\0\0\0\x06second");
      peer.send(messages);
      peer.socket.shutdown();
      expect(await peer.all()).toBe(messages.toString());
      const greedy = await Peer.dial(1061, host);
      const { name } = greedy;
      greedy.send("\0\x01\0\x01");
      expect(await greedy.all()).toBe("");
      program.kill();
      expect(await program.stderr.text()).toBe(`${name}: a message of 65537 bytes is too long\n`);
    });
  });

  test.each(["SIGINT", "SIGTERM"] as const)(
    "%s ends a server at once and quietly, and it starts again",
    async (signal) => {
      const host = loopback();
      await using first = await new Program("server", host).listening();
      const peer = await Peer.dial(PORT, host);
      peer.send(HI);
      expect(await peer.all()).toBe("Farewell, client");
      await Peer.dial(PORT, host);
      first.kill(signal);
      await first.exited();
      expect(first.err).toBe("");
      await using second = await new Program("server", host).listening();
      expect(second.err).toBe("");
    },
  );

  test("a server whose standard output is closed goes on", async () => {
    const host = loopback();
    const program = Bun.spawn([process.execPath, SCRIPT, "server", host], {
      stdout: "pipe",
      stderr: "pipe",
    });
    for await (const line of program.stdout) {
      expect(Buffer.from(line).toString()).toBe(`Listening at ('${host}', 1060)\n`);
      break;
    }
    for (let round = 0; round < 3; round++) {
      const peer = await Peer.dial(PORT, host);
      peer.send(HI);
      expect(await peer.all()).toBe("Farewell, client");
    }
    program.kill("SIGKILL");
    expect(await new Response(program.stderr).text()).toBe("");
  });

  test("a client gives up on a connection that is not made in time, and closes one made too late", async () => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    program.kill("SIGSTOP");
    // More than the server's backlog: the last ones wait for it.
    for (let i = 0; i < 600; i++) void Peer.dial(PORT, host);
    await expect(connect(host, PORT, 0.1)).rejects.toMatchObject({
      message: `cannot connect to ('${host}', 1060): timed out`,
      code: "ETIMEDOUT",
    });
    program.kill("SIGCONT");
    await program.until(({ err }) => err.endsWith("\n"));
    expect(program.err).toMatch(
      /^\('127\.0\.0\.1', \d+\): socket closed 0 bytes into a 16-byte message\n$/,
    );
  });
});

// What a server costs is read from /proc.
describe.skipIf(process.platform !== "linux")("under load and faults", () => {
  const MiB = 2 ** 20;

  async function exchange(host: string, message: Buffer | string = HI): Promise<string> {
    const peer = await Peer.dial(PORT, host);
    peer.send(message);
    const reply = await peer.all();
    peer.socket.end();
    return reply;
  }

  /** The most memory that `pid` has held so far, in octets. */
  async function peakMemory(pid: number): Promise<number> {
    const status = await Bun.file(`/proc/${pid}/status`).text();
    return Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1]) * 1024;
  }

  const descriptors = (pid: number) => readdirSync(`/proc/${pid}/fd`).length;

  test("clients that reset leave nothing behind", async () => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    await exchange(host);
    const before = descriptors(program.pid);
    for (let i = 0; i < 200; i++) {
      const peer = await Peer.dial(PORT, host);
      peer.send(HI.subarray(0, i % 17));
      if (i % 3 === 0) await roundTrip();
      peer.socket.terminate();
    }
    do expect(await exchange(host)).toBe("Farewell, client");
    while (descriptors(program.pid) > before);
    const line = /^(\('127\.0\.0\.1', \d+\)|a client): connection reset by peer$/;
    expect(program.err.split("\n").filter((text) => text && !line.test(text))).toEqual([]);
  });

  test.each([
    ["a message", HI],
    ["a message and a surplus", Buffer.alloc(17)],
    ["all but the last octet of a message", HI.subarray(0, 15)],
  ])("256 MiB behind %s stay out of memory", async (_, start) => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    await exchange(host);
    const before = await peakMemory(program.pid);
    const peer = await Peer.dial(PORT, host);
    peer.send(start);
    await roundTrip();
    for (let i = 0; i < 256; i++) {
      peer.send(Buffer.alloc(MiB));
      await peer.drained();
    }
    expect(await peer.all()).toBe("Farewell, client");
    expect(await exchange(host)).toBe("Farewell, client");
    expect(await peakMemory(program.pid)).toBeLessThan(before + 64 * MiB);
  });

  test("stalled clients cost little, delay nobody and can go on", async () => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    await exchange(host);
    const [memory, fds] = [await peakMemory(program.pid), descriptors(program.pid)];
    const peers = await Promise.all(Array.from({ length: 500 }, () => Peer.dial(PORT, host)));
    for (const peer of peers) peer.send("Hi ther");
    expect(await exchange(host)).toBe("Farewell, client");
    expect(await peakMemory(program.pid)).toBeLessThan(memory + 16 * MiB);
    for (const peer of peers.slice(250)) peer.send("e, server");
    for (const peer of peers.slice(250)) expect(await peer.all()).toBe("Farewell, client");
    for (const peer of peers) peer.socket.end();
    do expect(await exchange(host)).toBe("Farewell, client");
    while (descriptors(program.pid) > fds);
  });

  test("1,000 exchanges, 25 at a time, are 1,000 right replies and 5,001 whole lines", async () => {
    const host = loopback();
    await using program = await new Program("server", host).listening();
    const messages = Array.from({ length: 1000 }, (_, i) => `message ${i}`.padEnd(16));
    const queue = [...messages];
    const replies: string[] = [];
    const work = async () => {
      for (let next = queue.pop(); next; next = queue.pop())
        replies.push(await exchange(host, next));
    };
    await Promise.all(Array.from({ length: 25 }, work));
    expect(replies).toEqual(messages.map(() => "Farewell, client"));
    await program.until(({ out }) => out.split("\n").length > 5001);
    const lines = program.out.trimEnd().split("\n");
    const says = "The incoming sixteen-octet message says ";
    expect(lines.length).toBe(5001);
    expect(lines.filter((line) => line.startsWith(says)).toSorted()).toEqual(
      messages.map((message) => `${says}'${message}'`).toSorted(),
    );
    const name = String.raw`\('127\.[\d.]+', \d+\)`;
    const whole = new RegExp(
      `^(Listening at ${name}|We have accepted a connection from ${name}|Socket connects ${name} and ${name}|${says}'.{16}'|Reply sent, socket closed)$`,
    );
    expect(lines.filter((line) => !whole.test(line))).toEqual([]);
  });
});
